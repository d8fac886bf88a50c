"""Pictures of graphs: squares are variables, circles operators, arrows data flow."""
