"""Parts that the torch, JAX and Keras runners share."""
