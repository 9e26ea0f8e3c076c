"""The parts of `rollahead bench exactness`."""
