"""Prompts for a frozen model of pictures and texts, learnt by sites together: DP-FPL and what it is compared with.

The encoders are frozen and public. A class is told to the text encoder as M context vectors of width W (the prompt, the same for all
classes) and the class's name; a picture belongs to the class whose text feature is nearest. What is learnt:

    p_G  (M, W)   shared: sent to the server, averaged, sent back
    p_L  (M, W)   of one site; stays there, in its folder. DP-FPL factorises it before every step: p_L = u v + r,
                  u (M, k) and v (k, W) of orthonormal columns and rows, r the residual.

Claim (DP-FPL). Unit: the record or person of the site's own ``DpSgd`` plan; adjacency: the plan's. Each step samples every unit by
its own coin; takes of each unit the gradients for u, v and p_G *at the whole prompt* p_G + u v + r; clips them per unit (each block to
its own bound, or all as one vector); adds them up, adds noise, divides by the public B. These are three Gaussians on one sample: one
Poisson-sampled Gaussian of noise multiplier (sum_m sigma_m^-2)^(-1/2), one event, charged before the data are read, however many of the
three leave the site. Steps compose in the site's ledger, over all rounds.

Who sees what:

    the server, the other sites   p_G after every round: functions of the noised sums. They are promised the plan's epsilon. Nothing
                                  is added at the server, and nobody is trusted.
    who may ask the site's model  p_G + p_L: also functions of the noised sums, since p_L moves by nothing else. The same epsilon, for
                                  both together. u, v, r are neither sent nor noised by themselves: r is what the factorisation leaves
                                  of a p_L that is private already; how p_L is cut depends on p_L and on dice alone.
    who reads the site's disk     p_L as it is; nothing at home hides it beyond that epsilon.

Why u and v are charged although they stay at home: p_G's gradient is taken at p_L. Were p_L moved by gradients without noise ("it is not
sent"), one record more would move p_L, and with it the gradient of *every* record in all later steps: clipping one record bounds nothing
then, and p_G would have no guarantee, let alone the site's own model. ``tests/federation/test_prompts_attack.py`` reads a record back so.

Differs from the paper and its released code: gradients are clipped per unit (there: the mean of the batch, which one record can turn
around); u, v and p_G are one event (there: each is accounted as if alone); p_G is noised at the site (there at the server, which sees
the sites' own gradients first); the update of p_L subtracts u u^T (du) v as in the paper's equation (there it is added).
``releases = "once"`` noises the gradient of the prompt itself once: the three blocks are linear functions of it, so the same epsilon
buys all of them with less noise.

settings.py   what is learnt, and how        methods.py    the prompt, the losses, per-unit gradients, updates
encoders.py   a CLIP checkpoint from disk    training.py   the private steps (``TrainSteps`` of the federation)
small.py      a small dual encoder           transport.py  optimal transport between patches and prompts (FedOTP)
learner.py    records, and a prompt as a file; a recipe of prompts: ``sfumato.prompting``, ``models.prompt_settings``

Sources: DP-FPL, Tran et al. 2025, arXiv:2501.13904; PromptFL, Guo et al. 2023, arXiv:2208.11625; FedOTP, Li et al. 2024,
arXiv:2403.00041; FedPGP, Cui et al. 2024, arXiv:2405.09771; CLIP, Radford et al. 2021, arXiv:2103.00020.
"""
