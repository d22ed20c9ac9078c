"""Which two of K answers become a preference pair, and why the others do not."""
