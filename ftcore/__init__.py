"""Fine-tuning of language models, written out: seven stages, in the order that data flows.

A module imports only from its own line and the lines above it. Below them all stands `kernels`,
which never imports ftcore; above them all stand the scripts.

    errors config cli            what the user says, and what is said back
    hub                          from a name of a model to its folder
    files                        what is written whole or not at all
    builtin                      the embedded default: a tiny base model and chat data
    data                         1 dataset preparation
    model                        2 model initialisation
    env                          3 environment
    tune                         4 partial and full fine-tuning
    evaluate                     5 evaluation
    align                        preference and RL: reward models, DPO, PPO and its siblings
    deploy                       6 deployment
    monitor                      7 monitoring
    verify                       the invariance suite, on the user's own model and data"""
