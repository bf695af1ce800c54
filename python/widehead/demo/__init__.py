"""widehead/demo -- the place resolver: any name of a place, in any script or spelling, to the place."""
