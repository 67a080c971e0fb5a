"""What Wanda++ adds to Wanda: gradients of the block in the score, and weights refined on the block's output."""
