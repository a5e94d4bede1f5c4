"""The process that works: how it is stopped, how long it takes, what memory it has, where it runs."""
