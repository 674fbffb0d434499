"""Weighted multi-token prediction: which tokens deserve weight, and is it the signal or any weight at all?"""
