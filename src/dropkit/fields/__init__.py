"""What dropout and committees are for, a folder for each field, on the library that its people use."""
