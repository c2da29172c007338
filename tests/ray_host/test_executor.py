def test_cluster(ray_cluster):
    import ray
    @ray.remote
    def f(): 
        import os, sys
        return os.environ["PYTHONPATH"], sys.path[:4]
    print(ray.get(f.remote()), ray.cluster_resources())
