"""`distill doctor`: is this pair fit for this recipe?"""
