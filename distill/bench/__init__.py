"""`distill bench`: arms and seeds over a recipe, with verdicts."""
