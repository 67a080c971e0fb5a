"""What pruners share: arguments, masks, schedules, weights that stay zero."""
