"""What a recipe trains, said beforehand."""
