# %% [markdown]
# A sweep from Python or a notebook: what `patternsearch sweep` does, with the result at hand.

# %%
import patternsearch

result = patternsearch.sweep(
    "digits",  # or an .npz, a YAML file, a Task class of yours
    trials=4,
    seed=1,
    caps={"parameters": 7500},
    train={"epochs": 2},
    executor="inline",  # leave it out to use every core, or every GPU with resources={"gpu": 1}
)

# %% The best trial, and those that none beats in both accuracy and parameters
best = result.best
print(f"trial {best.number}, accuracy {best.values['accuracy']:.3f}: {best.pattern}")
for trial in result.front:
    print(trial.values["parameters"], trial.objectives[0])

# %% All of them as a pandas DataFrame: values, parameters of the space, states, reasons
table = result.trials
print(table[["state", "origin", "accuracy", "parameters"]].sort_values("accuracy"))

# %% The pattern as YAML with its weights; the model of it needs torch alone
path = result.export("best.yaml")
model = patternsearch.build(path)
print(sum(p.numel() for p in model.parameters()), "parameters in", path)
