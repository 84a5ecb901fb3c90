"""What other people's trainers need to train a wrapped model; import the module of yours."""
