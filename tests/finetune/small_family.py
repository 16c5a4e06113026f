"""What makes the small finetuning run one of a descendant of DETR."""

CONDITIONAL = (
    "model.decoder_attention=conditional",
    "model.pre_norm=false",
    "model.class_scores=sigmoid",
    "costs.classes=2",
    "losses.classes=2",
)
ANCHORS = (
    *CONDITIONAL,
    "model.query_kind=anchor",
    "model.position_temperature=20",
    "model.scale_positions=true",
    "model.activation=prelu",
    "model.dropout=0",
    "losses.classes=1",
)

DEFORMABLE = (
    "model.encoder_attention=deformable",
    "model.decoder_attention=deformable",
    "model.pre_norm=false",
    "model.hidden_dim=32",
    "model.encoder_layers=2",
    "model.feature_levels=2",
    "model.class_scores=sigmoid",
    "costs.classes=2",
    "losses.classes=2",
    "optimiser.sampling_lr=1e-4",
)
"""Learned queries, shared heads."""
TWO_STAGE = (*DEFORMABLE, "model.box_refinement=true", "model.two_stage=true")
SPARSE = (
    *TWO_STAGE,
    "model.proposal_content=memory",
    "model.proposal_classes=all",
    "model.rho=0.4",
)
