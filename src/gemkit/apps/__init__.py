"""What people do with a model besides asking it: `check` lints its files, `doctor` looks at the machine."""
