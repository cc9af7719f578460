"""One command a file. `contract` keeps the promises that all stages share; no algorithm lives here."""
