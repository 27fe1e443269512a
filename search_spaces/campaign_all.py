"""Every paper's campaign as one: what they share is prepared once."""

from search_spaces import campaign_d3still, campaign_ddps, campaign_face, campaign_rsiamnet, campaign_sureid
from search_spaces._campaign import Campaign

PAPERS = (campaign_d3still, campaign_sureid, campaign_face, campaign_ddps, campaign_rsiamnet)

CAMPAIGN = Campaign(
    question="What do the tables of all five papers say when every row is run anew?",
    sweeps=tuple(sweep for paper in PAPERS for sweep in paper.CAMPAIGN.sweeps),
)
