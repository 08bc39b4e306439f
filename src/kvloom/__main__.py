"""`python -m kvloom`: the command line.

Knows: where it begins.
Does not know: anything else.
"""

from kvloom.cli import main

if __name__ == "__main__":
    main()
