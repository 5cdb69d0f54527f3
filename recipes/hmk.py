"""The hierarchical mixture of kernels: recipes/kernel_dpo.py with a learned mixture of all four (arXiv 2501.03271).

    accelerate launch recipes/hmk.py                                       # the bundled model and pairs, hidden states
    accelerate launch recipes/hmk.py --loss "hmk(entropy=0.05)" --loss_learning_rate 1e-2
    accelerate launch recipes/hmk.py --loss "hmk(embeddings='given')" --embeddings all-MiniLM-L6-v2

The mixture's weights are parameters of the loss with a learning rate of their own; they are logged as weights/*.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "hmk(divergence='kl')"

if __name__ == "__main__":
    main(LOSS)
