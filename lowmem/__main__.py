"""`python -m lowmem` is the command `lowmem`."""

from lowmem.cli.main import main

if __name__ == "__main__":
    main()
