"""What programs cost: counted in the jaxpr and in the compiled program, timed, and predicted."""
