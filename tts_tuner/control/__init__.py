"Decisions about a run while it goes on: numbers in, changes out. Pure Python."
