"""What single libraries need beside the class of their blocks; none is imported before it is used."""
