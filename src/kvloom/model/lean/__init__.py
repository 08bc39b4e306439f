"""The lean runner: a straight-line decoder, proved equal to the seam at load."""
