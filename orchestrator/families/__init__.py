"""What methods of one task share. A family never imports a method: a teacher is named by string."""
