"""What is known of one tensor: its view as a matrix, its values, a gradient in a subspace."""
