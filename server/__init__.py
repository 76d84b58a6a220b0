"""All it takes to run an MLflow tracking server for a team: start, check, accounts, progress, backup."""
