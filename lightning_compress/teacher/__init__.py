"""What distillation needs beside the loss: the teacher itself, what it says, its cache on disk, learned projections."""
