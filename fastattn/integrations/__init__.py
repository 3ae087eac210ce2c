"""fastattn inside other libraries; importing one of these modules imports that library."""
