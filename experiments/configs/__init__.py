"""One file per trained result; what they share is `study`."""
