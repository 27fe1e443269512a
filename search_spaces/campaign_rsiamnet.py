"""R-SiamNet: every table of Han et al., ICCV 2021, and its curves."""

from search_spaces._campaign import Campaign, Sweep

CAMPAIGN = Campaign(
    question="What do the tables of R-SiamNet say when every row is run anew?",
    sweeps=(
        *(Sweep("rsiamnet_losses", on, priority=2) for on in ("cuhk_sysu", "prw")),
        *(Sweep("rsiamnet_losses", on) for on in ("cuhk_sysu_large", "prw_large")),
        *(
            Sweep("rsiamnet_data_scale", f"{on}{more}")
            for on, other in (("cuhk_sysu", "prw"), ("prw", "cuhk_sysu"))
            for more in ("", f"_and_{other}", "_and_both")
        ),
        Sweep("rsiamnet_consistency", "cuhk_sysu"),
        Sweep("rsiamnet_gamma_momentum", "cuhk_sysu"),
    ),
)
