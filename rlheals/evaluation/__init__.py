"""How a checkpoint is judged: graded conversations, teacher-forced losses, and the choice of a rung."""
