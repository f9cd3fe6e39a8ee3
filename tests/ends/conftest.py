"""The programs that these tests start aren't tests."""

collect_ignore = ["inside.py", "residue.py", "signalled.py"]
