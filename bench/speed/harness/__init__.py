"""Workers, rounds and reports of the speed suites."""
