"""Tests of kvloom; one folder per room."""
