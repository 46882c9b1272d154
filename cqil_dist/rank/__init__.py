"""One rank: the walk through a step, its weights and cache, and the Ray actor that holds it.

stage, bypass      the arithmetic of one stage, and what its feed-forwards see
program            the walk over all stages
protocol           steps and answers between the coordinator and its ranks, both ends
actor, mesh_spec   the Ray actor, what it says of itself, and what it is told to join a mesh
spec               what the actors of a launch are told
model_files        the model's files on this node
clock, metrics     where a step's time goes
memory             what the process may take, and gives back
layer_timing       how long a layer takes here, without any exchange
"""
