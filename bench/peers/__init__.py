"""Other methods of layout guidance, written from their papers, that run in our sampler."""
