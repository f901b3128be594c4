"""How the weights of the experts lie in memory, and the tensor to multiply that each way yields."""
