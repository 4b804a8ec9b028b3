"""The search for eta0, window and lambdas."""
