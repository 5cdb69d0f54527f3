"""DPO-Kernels: DPO's margin with a kernel's on embeddings beside it, and a divergence from the reference (2501.03271).

    accelerate launch recipes/kernel_dpo.py                                # the bundled model and pairs, hidden states
    accelerate launch recipes/kernel_dpo.py --loss "kernel_dpo(kernel='mahalanobis', divergence='wasserstein')"
    accelerate launch recipes/kernel_dpo.py --loss "kernel_dpo(embeddings='given')" --embeddings all-MiniLM-L6-v2
    accelerate launch recipes/kernel_dpo.py --config configs/papers/kernel_dpo.yaml --demo

The last but one needs `pip install -e ".[embeddings]"`, or the Hub. docs/kernels.md says what is the paper's here.
Options are those of recipes/dpo.py.
"""

from prefopt.recipe import main

LOSS = "kernel_dpo(kernel='rbf', divergence='kl')"

if __name__ == "__main__":
    main(LOSS)
