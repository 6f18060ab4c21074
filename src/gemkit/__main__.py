"""`python -m gemkit` is the command `gemkit`."""

from gemkit.cli import main

if __name__ == "__main__":
    main()
