"""What several commands share: arguments, errors and statuses, tables on the terminal."""
