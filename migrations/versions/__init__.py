"""One file per revision; what is released is never edited."""
