"""One file per strategy: the file name is the name in configurations, and no other file belongs here."""
