"""The loop as Prefect flows and as a command line. The only package that imports prefect, and only where it is needed."""
