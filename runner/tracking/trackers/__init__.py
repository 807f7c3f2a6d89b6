"""The trackers that conf/trackers/ names, one in each module; none imports its library before a run opens it."""
