"""Diffusion: samples from data by undoing noise.

The engine sees every network as `denoise(x, sigma) -> x_0`, x being data plus noise of standard deviation sigma:

- `_process`: x_t = alpha(t) x_0 + sigma(t) noise (variance preserving and exploding, cosine, flow, bridge,
  mean-reverting, or a trained model's table), and the ratio sigma / alpha that samplers see.
- `_denoiser`: a network that predicts x_0, noise, v, score or velocity as such a denoiser, exactly; the one denoising
  error that losses weight.
- `_samplers`: s(denoise, x, sigmas, *, generator). `_guidance`: g(cond, uncond, state) -> (guided, state).
- `_discrete`: noise on tokens (absorbing, uniform, step by step), its posterior and sampler.
- `_distil`: generators of one or a few steps from a teacher's score, as a procedure.
- `_mixture`, `_chain`: Gaussian mixtures and Markov chains, whose perfect networks are known.
- `_diffusers`: samplers, guidance and losses of this room in Hugging Face's `diffusers`, see docs/diffusers.md.

| Your trouble | Try first | Then |
|---|---|---|
| one step instead of many | `ScoreIdentityDistillation` | `DistributionMatchingDistillation`, `DMD2`, `FDistillation` |
| such training is slow to start, or guided by chance | `DistributionBacktracking` | `ProperGuidanceDistillation` |
| fewer evaluations, same network | `AdaptiveGuidance` | not here: `SkipTuning`, `early_exit_denoise` |
| few steps for sequences whose elements have a better model | `VideoDistributionMatching` | |
| consistency training of latents with outliers | `ConsistencyModel` with `cauchy_loss`, undecided here | |
| strong guidance burns out | `AdaptiveProjectedGuidance`, on digits | not here: `guided_noise_loss` |
| what a prompt must not bring | `steer_away` | |
| rare modes are drawn too seldom | more samples, and the rarest by `minority_score` | not here: `MinorityGuidance` |
| shares of groups are wrong | `distributional_alignment_loss` | with `adjusted_direct_finetune` |
| a reward model is right only sometimes | `CtrlULoss` | `ReweightedPreferenceLoss`, for long prompts |
| several objects in a prompt, one swallows another | `cross_token_nms` | `correct_by_similarities` |
| prompts longer than the encoder | `segment_encode` | |
| new concepts from one masked picture | `masked_diffusion_loss` with `union_sampling` | `cross_attention_mask_loss` |
| ten pictures of a new domain | `phasic_adaptation_loss` | `cross_domain_structure_guidance` |
| the look of one picture on the shape of another | `structure_appearance_guidance` | |
| texture from one picture into a masked other | `spatial_concat_condition` | `decoupled_mask_prediction` |
| people who must not be recognised | `AnonymizingDenoiser` | `reidentification_rate` tells how well |
| what to measure next, and the rest filled in | `ActiveDiffusionSampler` | `dps_step`, for fixed measurements |
| a scene in 3-D from a 2-D model | `ScoreJacobianChaining` | |
| has it memorised? | `score_convergence_test` | `denoiser_jacobian_basis` |
| how to weigh the noise levels | `snr_weight` of the prediction | `debiased_estimation_loss`, for deep noise |
| outliers in the data | `scheduled_pseudo_huber_loss`, on digits | `cauchy_loss` in consistency training |
| the clean score is known, samples are dear | `target_score_matching_loss` | `target_score_estimate` |
| an unnormalised density, no samples | `PathIntegralSampler` with `log_variance_loss` | |
| text and tokens | `order_agnostic_loss`, then `first_hitting` | `D3PM` where some tokens are near others |
| tokens drawn one by one, few network calls | `first_hitting` | `truncated_gumbel_probabilities`: what float32 does |
| tokens without a mask or a matrix | not here, where masks were better: `DiscreteBFN` | `ContinuousBFN` for numbers |
| diffusion on word embeddings | `embedding_diffusion_anchor_loss` | `SoftMaskedNoise` |
| which of many candidates fits a query | `diffusion_rerank` | |
| weights of a network, asked for by their loss | `CheckpointDiffusion` | |
| the bound itself is what counts | `DiffEnc` | `best_variance_ratio` |
| data near a plane of few dimensions | `SubspaceScoreNet` | `MoLRGDenoiser` for several planes |
| how many samples it takes | `minimax_exponent` | `empirical_rate`, `RidgeTilt` |

What we found, on mixtures of Gaussians, small texts, pictures of 8 to 12 pixels and real digits of 8x8 and 16x16, where
much of what is said of large models does not show. The plane and the digits do not always agree:

- One step: a distilled generator is as near the data as 35 evaluations of its teacher. But regression on the teacher's
  pairs was nearer than DMD, in the plane and on digits, and backtracking no faster; in the plane plain differences of
  scores did as well as SiD's loss. Forward KL and Jensen-Shannon lose fewer modes than reverse KL, by 11 points.
- Fewer evaluations, same network: adaptive guidance spares a fifth to a quarter. In the plane it then ends as full
  guidance does; on digits full guidance in fewer steps comes nine times nearer to that. Scaled skips and early exits
  brought nothing.
- Guidance: projected, it stays a third nearer to real digits at a scale of 6, though not nearer to Gaussians. Guidance
  in training at equal cost and both edits of a prompt brought nothing.
- Rare modes: the log-variance loss loses fewer modes. Neither minority guidance nor a particle filter beat drawing more
  and picking, in the plane or on digits. Shares of groups: assigned classes turn 10/90 into 50/50.
- Outliers: the scheduled pseudo-Huber loss was a fifth nearer to real digits where a tenth of the data are negatives,
  but worse in the plane. Weights for deep noise help there and cost the rest.
- Tokens: on grey levels, noise that moves to near values lowers the bound by 0.18 nats, on text a mask by 0.33 over
  random tokens. One network call for each token draws what a hundred steps do. On word embeddings cross-entropy at
  every step is worth 24 points, the order of words nothing.
- Conditions: texture comes over better beside the picture than through one vector, and a second pass with the predicted
  mask is better than one twice as long; random subsets of concepts are worth 25 points when several are asked for;
  deviations of two readings find a reward's errors, its own entropy better.
- Inverse problems: pixels chosen actively were no better than good fixed ones, of made-up and of real digits.
"""

from lossary.catalogue import lazy_room

_ENGINE = {
    "_diffusers": "DiffusersDenoiser DiffusersGuider DiffusersScheduler",
    "_distil": "OneStepGenerator karras_levels",
    "_guidance": "Guided classifier_free",
    "_samplers": "ancestral dpm_solver_pp euler heun karras_sigmas predictor_corrector process_sigmas sde",
}
__getattr__, __dir__ = lazy_room(
    __name__, {name: f"{__name__}.{file}" for file, names in _ENGINE.items() for name in names.split()}
)
