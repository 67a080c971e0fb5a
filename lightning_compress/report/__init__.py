"""What a run leaves to read: summary.json, modules.csv, the table on the screen, a figure. Reads the ledger only."""
