"""Networks. Import them from their own modules: ``stunet_plugin.networks.stunet.STUNet``."""
