"""What the float encoder does inside, on calibration data: live values piece by piece, ranges, second moments."""
