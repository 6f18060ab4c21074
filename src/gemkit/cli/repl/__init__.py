"""The chat in the terminal: session (the conversation), commands, markdown and wrap (the answers), terminal."""
